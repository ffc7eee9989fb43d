# docker build --file deploy/exporter.Dockerfile --tag registry.example.com/clipweld-exporter .
# Promotes, rolls back, lists and prunes; merging needs torch, and is done where training is.
FROM python:3.11-slim
COPY LICENSE requirements/exporter.txt /src/
COPY exporter /src/exporter
COPY trainer /src/trainer
RUN pip install --no-cache-dir --no-deps --require-hashes -r /src/exporter.txt \
  && pip install --no-cache-dir --no-deps /src/trainer /src/exporter && rm -r /src
COPY deploy/on-all-servers /usr/local/bin/
USER 1000:1000
