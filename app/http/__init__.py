"""What stands around every request: connections, access, deadlines, uploads, the log, OpenAPI."""
