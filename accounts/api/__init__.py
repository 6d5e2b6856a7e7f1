"""The HTTP interface: what arrives is checked here, what happens is decided in `accounts`."""
