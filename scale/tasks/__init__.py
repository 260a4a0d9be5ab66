"""One module per command: settings in, calls to the rooms below, an exit status out."""
