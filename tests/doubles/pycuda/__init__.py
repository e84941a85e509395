"""A double of pycuda: what a program around TensorRT needs of it, see `pycuda.driver`."""

VERSION = (2024, 1, 2)
VERSION_STATUS = ""
VERSION_TEXT = "2024.1.2"
