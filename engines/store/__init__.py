"""What lies on the disk: versions of models and their files, training images."""
