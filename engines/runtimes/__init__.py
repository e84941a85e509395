"""The inference runtimes, each behind the `Runtime` protocol."""
