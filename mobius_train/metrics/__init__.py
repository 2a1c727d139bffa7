"""What a run reports: metric files, TensorBoard, peak memory and the motion of clips."""
