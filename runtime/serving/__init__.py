"""Answer over HTTP: rows of all requests share the steps of one walk."""
