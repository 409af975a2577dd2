"""One thin script per stage of dvc.yaml: read the declared parameters, call the library, write the outputs."""
