"""Settings of all tests."""

from hypothesis import settings

# A busy machine may take its time: a slow example is no failure.
settings.register_profile("upwell", deadline=None)
settings.load_profile("upwell")
