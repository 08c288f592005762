"""Speaker encoders from unlabelled speech, for SpeechBrain."""

__version__ = "0.1.0"
