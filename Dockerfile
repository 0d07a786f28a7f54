# plato2 serve on a CPU: docs/serve.md, "Docker".
FROM python:3.11-slim

WORKDIR /app
COPY pyproject.toml requirements.txt requirements-dev.txt README.md LICENSE ./
# The CPU build of the pinned torch; the one on PyPI brings gigabytes of CUDA.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.txt)"
COPY plato2 plato2
COPY conf conf
COPY hydra_plugins hydra_plugins
RUN pip install --no-cache-dir -r requirements.txt -c requirements-dev.txt ".[serve]"

RUN useradd --create-home plato2
USER plato2
WORKDIR /home/plato2

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["plato2", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model"]
