"""The one file that goes into every checkpoint, so that it loads where lrcompress is not installed."""
