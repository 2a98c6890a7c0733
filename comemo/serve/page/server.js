/** HTTP of the server: its models, facts about pictures, answers while they are written. */

/** What a person is told; `status` is that of HTTP, 0 where there was none. */
export class ServerError extends Error {
  constructor(text, status = 0) {
    super(text);
    this.status = status;
  }
}

const BROKEN = "The connection ended before the answer did.";

/** The server that this page came from. */
export class Server {
  key = "";

  /** Names of the models. */
  async models() {
    const found = await (await this.#send("v1/models")).json();
    return found.data.map((model) => model.id);
  }

  /** Size, tiles and position ids of a picture, given as a data URL. */
  async facts(image) {
    return (await this.#send("comemo/picture", { image })).json();
  }

  /** Chunks of an answer. `body` is that of a chat completion; `signal` stops it. */
  async *answer(body, signal) {
    const response = await this.#send("v1/chat/completions", body, signal);
    for await (const data of events(response.body.getReader())) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(textOf(chunk.error) ?? BROKEN);
      yield chunk;
    }
    throw new ServerError(BROKEN);
  }

  async #send(path, body, signal) {
    const options = { headers: {}, signal };
    if (this.key) options.headers.Authorization = `Bearer ${this.key}`;
    if (body !== undefined) {
      options.method = "POST";
      options.headers["Content-Type"] = "application/json";
      options.body = JSON.stringify(body);
    }
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached.");
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }
}

async function errorOf(response) {
  const said = await response.json().catch(() => null); // a proxy may answer with a page
  const plain = `The server answered ${response.status} ${response.statusText}`.trim();
  return new ServerError(textOf(said?.error) ?? `${plain}.`, response.status);
}

function textOf(error) {
  return typeof error?.message === "string" && error.message ? error.message : null;
}

/** The data of server-sent events, one after the other. */
async function* events(reader) {
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += decoder.decode(value, { stream: true });
      const lines = held.split(/\r\n|\n|\r(?!$)/);
      held = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(BROKEN);
  } finally {
    reader.cancel().catch(() => {});
  }
}
