# Dockerfile
FROM anyscale/ray-llm:2.59.0-py312-cu130
RUN pip install --no-cache-dir tenacity==9.2.1
