"""`lrc recipe`: list, show, write, check and compare recipes."""
