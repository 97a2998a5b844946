"""Methods that prune inner channels of feed-forwards, one file each."""
