"""What the doors call: each command reads its words, asks for a plan, and answers with an exit code."""
