/**
 * Sends events to Kafka, as every producer of `lingua.events` does: keyed by scope, with Java's partitioner,
 * acknowledged by all replicas, in the order of the calls.
 *
 * An event's bytes are made once, before the first attempt, so a retry sends the same. Nothing is kept on the
 * disk: what was not acknowledged when the process ends is lost. A compute node, which earns and charges by
 * its events, uses the Python client or does as that does (docs/nodes.md).
 */

import { Kafka, logLevel, Partitioners, type Producer, type RecordMetadata } from "kafkajs";

import {
  type CloudEvent,
  type DataOf,
  EventIds,
  EventSchemas,
  type EventType,
  scopeOf,
  type UsageData,
  wholeMs,
} from "./events.js";

export interface EmitterOptions {
  brokers: string[];
  nodeId: string;
  /** The directory with the exported JSON Schemas. */
  schemas: string;
  topic?: string;
}

/** What the broker has: where the event is, and its bytes. */
export interface Sent {
  id: string;
  key: string;
  value: string;
  partition: number;
}

export type Stage = "asr" | "nmt" | "tts";

export type UtteranceFields = Omit<
  UsageData,
  "node_id" | "utterance_id" | "asr_time_ms" | "nmt_time_ms" | "tts_time_ms" | "gpu_active_time_ms"
> & { utterance_id?: string };

/** Measures one utterance with the monotonic clock; a stage that runs twice adds up. */
export class Utterance {
  readonly #spentMs: Record<Stage, number> = { asr: 0, nmt: 0, tts: 0 };
  /** Active GPU, in ms; at the end it is cut to the three stages together. */
  gpuActiveMs = 0;
  /** Whether any stage was measured. */
  used = false;

  /** Runs the work and counts its time, also when it throws. */
  async measure<T>(stage: Stage, work: () => Promise<T> | T): Promise<T> {
    this.used = true;
    const startedMs = performance.now();
    try {
      return await work();
    } finally {
      this.#spentMs[stage] += performance.now() - startedMs;
    }
  }

  /** Adds what was measured elsewhere. */
  add(stage: Stage, durationMs: number): void {
    this.used = true;
    this.#spentMs[stage] += durationMs;
  }

  times(): Pick<UsageData, "asr_time_ms" | "nmt_time_ms" | "tts_time_ms" | "gpu_active_time_ms"> {
    const [asr, nmt, tts] = [wholeMs(this.#spentMs.asr), wholeMs(this.#spentMs.nmt), wholeMs(this.#spentMs.tts)];
    return {
      asr_time_ms: asr,
      nmt_time_ms: nmt,
      tts_time_ms: tts,
      gpu_active_time_ms: Math.min(wholeMs(this.gpuActiveMs), asr + nmt + tts),
    };
  }
}

export class UsageEmitter {
  readonly #ids = new EventIds();
  readonly #schemas: EventSchemas;
  readonly #producer: Producer;
  readonly #nodeId: string;
  readonly #topic: string;
  #last: Promise<unknown> = Promise.resolve();

  constructor(options: EmitterOptions) {
    this.#schemas = new EventSchemas(options.schemas);
    this.#nodeId = options.nodeId;
    this.#topic = options.topic ?? "lingua.events";
    const kafka = new Kafka({ clientId: "lingua-node-ts", brokers: options.brokers, logLevel: logLevel.ERROR });
    this.#producer = kafka.producer({
      // murmur2, as Java has it; librdkafka calls it murmur2_random.
      createPartitioner: Partitioners.DefaultPartitioner,
      // kafkajs calls its idempotent producer experimental. Nothing here needs it: one send at a time keeps
      // the order, and metering drops a repeat with the same bytes.
      maxInFlightRequests: 1,
    });
  }

  async connect(): Promise<void> {
    await this.#producer.connect();
  }

  /** Waits for what is being sent. */
  async close(): Promise<void> {
    await this.#last.catch(() => undefined);
    await this.#producer.disconnect();
  }

  /**
   * Runs `body`, and sends what it measured, also when it throws; then its error goes first. Without a single
   * stage there is nothing to send: an event without usage would make its user a payer of a room's minute.
   */
  async utterance(
    fields: UtteranceFields,
    body: (utterance: Utterance) => Promise<void>,
  ): Promise<Sent | undefined> {
    const utterance = new Utterance();
    let sent: Promise<Sent | undefined> = Promise.resolve(undefined);
    try {
      await body(utterance);
    } finally {
      if (utterance.used) {
        sent = this.emit("lingua.usage.utterance.v1", {
          ...fields,
          node_id: this.#nodeId,
          utterance_id: fields.utterance_id ?? `ut-${this.#ids.next(Date.now())}`,
          ...utterance.times(),
        });
        // If the body threw, nobody awaits it.
        sent.catch(() => undefined);
      }
    }
    return sent;
  }

  /** Checks and sends one event; resolves when the broker has it. Rejects with InvalidEvent, or Kafka's error. */
  async emit<T extends EventType>(type: T, data: DataOf<T>): Promise<Sent> {
    const nowMs = Date.now();
    const key = scopeOf(data as { session_id?: string; room_id?: string });
    const event: CloudEvent<T> = {
      specversion: "1.0",
      id: this.#ids.next(nowMs),
      source: `node/${this.#nodeId}`,
      type,
      subject: key,
      time: new Date(nowMs).toISOString(),
      data,
    };
    this.#schemas.check(event);
    const value = JSON.stringify(event);
    // One after the other: two sends at once could overtake each other.
    const turn = this.#last.catch(() => undefined).then(() => this.#send(key, value));
    this.#last = turn;
    const [metadata] = await turn;
    return { id: event.id, key, value, partition: metadata?.partition ?? -1 };
  }

  #send(key: string, value: string): Promise<RecordMetadata[]> {
    return this.#producer.send({ topic: this.#topic, acks: -1, messages: [{ key, value }] });
  }
}
