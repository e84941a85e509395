"""What NVIDIA's libraries are called on this machine, and in what they differ. Loads none of them."""
