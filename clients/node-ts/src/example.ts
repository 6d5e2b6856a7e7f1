/**
 * Emits a room's and a session's events, and prints each as one line of JSON.
 *
 *   node dist/example.js BROKERS SCHEMAS [TOPIC]
 */

import { setTimeout as pause } from "node:timers/promises";

import { type Sent, UsageEmitter } from "./emitter.js";

const [brokers, schemas, topic] = process.argv.slice(2);
if (brokers === undefined || schemas === undefined) {
  console.error("usage: node dist/example.js BROKERS SCHEMAS [TOPIC]");
  process.exit(2);
}

function show(sent: Sent | undefined): void {
  console.log(JSON.stringify(sent));
}

const emitter = new UsageEmitter({
  brokers: brokers.split(","),
  nodeId: "n-desktop",
  schemas,
  ...(topic === undefined ? {} : { topic }),
});
await emitter.connect();
try {
  for (let room = 0; room < 8; room += 1) {
    const room_id = `r-${room}`;
    show(await emitter.emit("lingua.room.joined.v1", { room_id, user_id: "u-2" }));
    const spoken = { session_id: `s-${room}`, user_id: "u-1", room_id, source_lang: "zh", target_lang: "en" };
    show(
      await emitter.utterance({ ...spoken, utterance_id: `ut-${room}`, audio_ms: 1200 }, async (utterance) => {
        await utterance.measure("asr", () => pause(12));
        utterance.add("nmt", 80.5);
        utterance.add("tts", 200);
        utterance.gpuActiveMs = 250;
      }),
    );
    show(await emitter.emit("lingua.room.left.v1", { room_id, user_id: "u-2" }));
    show(await emitter.emit("lingua.room.closed.v1", { room_id }));
  }
  const session = { session_id: "s-alone", user_id: "u-3" };
  show(await emitter.emit("lingua.session.started.v1", session));
  show(await emitter.utterance(session, async (utterance) => utterance.add("asr", 7.5)));
  show(await emitter.emit("lingua.session.ended.v1", session));
} finally {
  await emitter.close();
}
