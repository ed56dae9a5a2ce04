"""The application for Ray Serve, which Ray starts."""

from server.part import Part

PART = Part()
