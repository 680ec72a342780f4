"""The texts that a teacher and a student read: styles, rendering, where the scored parts stand, rows with prompts."""
