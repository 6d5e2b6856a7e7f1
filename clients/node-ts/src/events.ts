/** The events that a node or a desktop client may send, checked against the exported JSON Schemas. */

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import { Ajv2020, type ValidateFunction } from "ajv/dist/2020.js";
import formats from "ajv-formats";

export type UsageType = "lingua.usage.utterance.v1";
export type SessionType = "lingua.session.started.v1" | "lingua.session.ended.v1";
export type MemberType = "lingua.room.joined.v1" | "lingua.room.left.v1";
export type RoomType = "lingua.room.closed.v1";
export type EventType = UsageType | SessionType | MemberType | RoomType;

/** One utterance's processing; durations are whole milliseconds, at most an hour each. */
export interface UsageData {
  session_id: string;
  room_id?: string;
  user_id: string;
  node_id: string;
  utterance_id: string;
  audio_ms?: number;
  asr_time_ms: number;
  nmt_time_ms: number;
  tts_time_ms: number;
  /** At most the three stages together. */
  gpu_active_time_ms: number;
  source_lang?: string;
  target_lang?: string;
}

export interface SessionData {
  session_id: string;
  user_id: string;
  room_id?: string;
}

export interface MemberData {
  room_id: string;
  user_id: string;
}

export interface RoomData {
  room_id: string;
}

export type DataOf<T extends EventType> = T extends UsageType
  ? UsageData
  : T extends SessionType
    ? SessionData
    : T extends MemberType
      ? MemberData
      : RoomData;

export interface CloudEvent<T extends EventType = EventType> {
  specversion: "1.0";
  id: string;
  source: string;
  type: T;
  subject: string;
  time: string;
  data: DataOf<T>;
}

const EVENT_TYPES: readonly EventType[] = [
  "lingua.usage.utterance.v1",
  "lingua.session.started.v1",
  "lingua.session.ended.v1",
  "lingua.room.joined.v1",
  "lingua.room.left.v1",
  "lingua.room.closed.v1",
];

const MAX_DURATION_MS = 3_600_000;

/** The event is not one that metering would accept; the message says which field and why. */
export class InvalidEvent extends Error {}

/** The Kafka key: the room if the event has one, else the session. */
export function scopeOf(data: { session_id?: string; room_id?: string }): string {
  return data.room_id === undefined ? `session/${data.session_id}` : `room/${data.room_id}`;
}

/** Measured milliseconds as whole ones: half up, 0 to an hour. */
export function wholeMs(durationMs: number): number {
  return Math.min(Math.max(Math.floor(durationMs + 0.5), 0), MAX_DURATION_MS);
}

/** Validates with the schema of each type, read from a directory (`schemas/exported` of Lingua Metering). */
export class EventSchemas {
  readonly #validators = new Map<string, ValidateFunction>();

  constructor(directory: string) {
    const ajv = new Ajv2020({ strict: true, allErrors: false });
    formats.default(ajv, ["date-time"]);
    for (const type of EVENT_TYPES) {
      const schema = JSON.parse(readFileSync(join(directory, `${type}.json`), "utf8")) as object;
      this.#validators.set(type, ajv.compile(schema));
    }
  }

  /** Throws InvalidEvent. */
  check(event: CloudEvent): void {
    const { type } = event;
    const validate = this.#validators.get(type);
    if (validate === undefined) {
      throw new InvalidEvent(`type: ${type} is not known`);
    }
    if (!validate(event)) {
      const problem = validate.errors?.[0];
      throw new InvalidEvent(`${type}${problem?.instancePath ?? ""}: ${problem?.message ?? "invalid"}`);
    }
    if (type === "lingua.usage.utterance.v1") {
      // The one rule that a JSON Schema cannot say.
      const data = event.data as UsageData;
      const stagesMs = data.asr_time_ms + data.nmt_time_ms + data.tts_time_ms;
      if (data.gpu_active_time_ms > stagesMs) {
        throw new InvalidEvent(
          `gpu_active_time_ms: ${data.gpu_active_time_ms} is more than the ${stagesMs} of the three stages`,
        );
      }
    }
  }
}

const ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/** ULIDs that only grow: also within a millisecond, and also while the clock goes back. */
export class EventIds {
  #last = 0n;

  next(nowMs: number): string {
    let number = (BigInt(nowMs) << 80n) | BigInt(`0x${randomBytes(10).toString("hex")}`);
    if (number >> 80n <= this.#last >> 80n) {
      number = this.#last + 1n;
    }
    this.#last = number;
    let text = "";
    for (let shift = 125n; shift >= 0n; shift -= 5n) {
      text += ALPHABET[Number((number >> shift) & 31n)];
    }
    return text;
  }
}
