# The flows and the command line, for docker-compose.yml.

FROM python:3.12.12-slim-bookworm AS dependencies
RUN python -m venv /opt/venv
COPY requirements.lock .
# Exactly what was locked and tested: a package with another hash ends the build.
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock

FROM python:3.12.12-slim-bookworm
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    METERING_STATE_DIR=/var/lib/metering
# A number of its own, so that volumes keep their owner from one image to the next.
RUN groupadd --gid 10001 metering \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /var/lib/metering --shell /usr/sbin/nologin metering
COPY --from=dependencies /opt/venv /opt/venv
# The program runs from its source: building a package of it would fetch tools that are not in the lock.
WORKDIR /opt/metering
COPY accounts ./accounts
COPY app ./app
COPY clients ./clients
COPY flows ./flows
COPY metering ./metering
COPY schemas ./schemas
COPY sinks ./sinks
COPY sources ./sources
COPY telemetry ./telemetry
RUN python -m compileall -q .
USER metering
VOLUME /var/lib/metering
ENTRYPOINT ["python", "-m", "app"]
