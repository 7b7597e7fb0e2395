"""What a bundle will take of a device, in bytes and time, and which of its sizes to choose."""
