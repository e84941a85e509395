"""The routes of the HTTP process, one file per subject."""
