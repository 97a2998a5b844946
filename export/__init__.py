"""Exports: a finished result in a format that other tools open without lrc. One file per format."""
