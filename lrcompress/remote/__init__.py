"""The files that go into every checkpoint, so that it loads where lrcompress is not installed."""
