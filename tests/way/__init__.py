"""The way of a request: the functions of the server that it enters, in order."""
