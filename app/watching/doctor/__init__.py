"""`kensa doctor`: what this machine has, which models fit, what is wrong, what to type for it."""
