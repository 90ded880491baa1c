# One image for each program, chosen by SERVICE: a static binary and the CAs,
# nothing else. `make images` builds all of them; the binaries are built outside,
# where the Go caches are.
FROM scratch
ARG SERVICE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fingerprint-prefetch ${SERVICE}" \
      org.opencontainers.image.revision="${REVISION}"
COPY bin/image/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY bin/image/${SERVICE} /service
USER 65532:65532
ENTRYPOINT ["/service"]
