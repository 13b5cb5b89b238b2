"""The bundled models: how they were trained, and how their editors were tuned."""
