"""Words with tags: files, schemes, the task, how it is judged, and a BiLSTM over a frozen encoder."""
