"""What users write: layout and job documents, as pydantic models with a committed JSON Schema each."""
