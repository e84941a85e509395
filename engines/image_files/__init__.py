"""A strict reader for each kind of image file: all the pixels that the file has, or none."""
