"""Records as token ids with loss masks: by chat templates or harmony, in files, and in bins of one length."""
