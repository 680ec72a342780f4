"""Loading models and tokenizers, and which frozen model is resident when."""
