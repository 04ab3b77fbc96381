"""Cases that were written beside the watches."""
