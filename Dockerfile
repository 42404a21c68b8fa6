# The gateway as an image: docker build -t redbtc-proxy .
#
# Without OPENAI_API_KEY in its environment, the container serves the demonstration:
#     docker run -p 8080:8080 redbtc-proxy
# docs/operating.md says how to keep one. The final stage runs nothing, and needs no shell.

ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /opt/redbtc-proxy
RUN python3 -m venv /tmp/pip && python3 -m venv --without-pip .
COPY requirements.lock /tmp/
RUN /tmp/pip/bin/pip --python bin/python install --no-cache-dir --disable-pip-version-check \
        --only-binary=:all: --require-hashes -r /tmp/requirements.lock
COPY redbtc_proxy.py schema.sql config.toml prices.toml app/
COPY redbtc app/redbtc
COPY deploy app/deploy
RUN chmod -R u=rwX,go=rX app && chmod 0755 app/redbtc_proxy.py \
    && sed -i '1s|.*|#!/opt/redbtc-proxy/bin/python3|' app/redbtc_proxy.py \
    && ln -s ../app/redbtc_proxy.py bin/redbtc-proxy \
    && bin/python -m compileall -q app lib \
    && mkdir /data

FROM ${BASE}
LABEL org.opencontainers.image.title="redbtc-proxy" \
      org.opencontainers.image.description="An OpenAI-compatible API gateway that is small enough to read" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /opt/redbtc-proxy /opt/redbtc-proxy
COPY --from=build --chown=10001:10001 /data /data
COPY --chmod=0644 deploy/container.toml /etc/redbtc-proxy/config.toml
ENV PATH=/opt/redbtc-proxy/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    REDBTC_CONFIG=/etc/redbtc-proxy/config.toml \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["python3", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["redbtc-proxy"]
CMD ["serve", "--first-run", "--demo-if-no-key"]
