"""What runs inside the jail: the standard library and the files of this folder alone."""
