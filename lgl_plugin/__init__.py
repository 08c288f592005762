"""Loss-gated self-supervised speaker recognition for SpeechBrain."""
