"""How the server is: metrics, health, `kensa doctor`."""
