"""What NVIDIA's libraries are called on this machine, and how they differ. Loads none of them."""
