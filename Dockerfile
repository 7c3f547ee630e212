# The server's image: one static binary, and what it can't do without.
#
#   docker build --build-arg VERSION=$(git describe --tags --always) -t aaserver .
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
# By name: whatever else lies in the directory, keys of a server that was tried
# there among it, stays out.
COPY main.go ./
COPY apis apis
COPY internal internal
COPY registry registry
COPY streaming streaming
ARG VERSION=
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    mkdir -p /rootfs/etc/ssl/certs /rootfs/tmp && \
    chmod 1777 /rootfs/tmp && \
    cp /etc/ssl/certs/ca-certificates.crt /rootfs/etc/ssl/certs/ && \
    echo 'aaserver:x:65532:65532::/:/aaserver' >/rootfs/etc/passwd && \
    echo 'aaserver:x:65532:' >/rootfs/etc/group && \
    CGO_ENABLED=0 go build -trimpath -tags fieldsv1string \
      -ldflags "-s -w -X aaserver.io/aaserver/internal/version.version=$VERSION" \
      -o /rootfs/aaserver .

FROM scratch
COPY --from=build /rootfs /
# By number, so that Kubernetes can tell that it isn't root.
USER 65532:65532
EXPOSE 8443
ENTRYPOINT ["/aaserver"]
CMD ["serve"]
