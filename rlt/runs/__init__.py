"""What a run leaves on disk, by names that one module owns; and what is known of earlier runs."""
