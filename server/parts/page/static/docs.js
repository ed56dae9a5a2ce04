// Shows openapi.json in Swagger UI, with the API key that was entered on the first page.
import { authorization } from "./key.js";

const response = await fetch("openapi.json", { headers: authorization() });
if (response.ok) {
  const spec = await response.json();
  spec.servers = [{ url: new URL(".", location.href).href.replace(/\/$/, "") }]; // a proxy may add a prefix
  window.SwaggerUIBundle({
    spec,
    dom_id: "#swagger-ui",
    deepLinking: true,
    tryItOutEnabled: true,
    displayRequestDuration: true,
    validatorUrl: null,
    requestInterceptor: (request) => {
      request.headers = { ...authorization(), ...request.headers };
      return request;
    },
  });
} else if (response.status === 401) {
  document.getElementById("no-key").hidden = false; // each tab has its own session storage
} else {
  document.getElementById("swagger-ui").textContent = `The server answered with status ${response.status}.`;
}
