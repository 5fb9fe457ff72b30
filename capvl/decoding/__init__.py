"""Text generation on the device."""
