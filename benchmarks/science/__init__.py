"""Tables of the published methods, made anew from one command each."""
