"""What users feel of a slim model: time, memory and size, engine by engine, beside what its sizes promise."""
