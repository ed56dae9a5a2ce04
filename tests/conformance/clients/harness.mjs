// Runs the checks in one client's file: `node openai_client.mjs URL KEY MODEL` prints a line of JSON for each check, as
// harness.py does.

const [url, key, model] = process.argv.slice(2);
export const server = { url, baseURL: `${url}/v1`, key, model };

// Run a named check, declaring which features it uses: `await exercises("chat")(async function plain() {})`.
export const exercises =
  (...capabilities) =>
  async (check) => {
    let failure = null;
    try {
      await check();
    } catch (error) {
      failure = error.stack ?? String(error);
    }
    console.log(JSON.stringify({ check: check.name, exercises: capabilities, failure }));
  };
