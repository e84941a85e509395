"""Drawn parts with known defects, for `make demo` and the tests."""
