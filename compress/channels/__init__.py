"""Methods that remove channels of feed-forwards, one file each."""
